"""The OpenAI-compatible HTTP server: authentication, admission, metrics and the web page."""
