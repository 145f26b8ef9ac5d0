"""The engine: its loop, and the clients that reach it in this process or in another."""
