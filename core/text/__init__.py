"""Text at the edge of the engine: tokenizer, incremental detokenizer, stop strings, templates."""
