"""What a cluster would do: the engine's own scheduler and blocks on a clock that a cost model advances.

Runs no model. Knows nothing of servers and clients.
"""
