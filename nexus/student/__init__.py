"""The student: trunk (core), router, and the module that joins them with the adapters (memory)."""
