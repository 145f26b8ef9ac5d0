"""Tokens to text and back: tokenizer, detokenizer, templates, stop strings."""
