"""What every request passes before it reaches a handler: pure ASGI, cheapest check first."""
