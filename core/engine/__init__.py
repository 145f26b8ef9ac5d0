"""The engine loop and the ways to reach it: in process, or in its own."""
