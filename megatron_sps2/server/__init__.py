"""The service: the loop of each rank, and the HTTP front end in a process of its own."""
