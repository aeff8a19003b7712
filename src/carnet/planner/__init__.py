"""The planner: headers in, rows out. It opens no file; what it returns is all that the executor knows."""
