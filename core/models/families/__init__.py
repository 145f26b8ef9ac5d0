"""Model families: one short file each, from config.json to a `DecoderSpec` and weight names."""
