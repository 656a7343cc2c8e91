"""The command line: one file a command, of the command's name."""
