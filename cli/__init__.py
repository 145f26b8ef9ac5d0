"""The `trimaran` command: one short file a subcommand."""
