"""Functions of `ops` compiled by Numba for this processor, for what torch does in many calls. Modules in here
alone import numba."""
