"""The command line: one thin file a command, which parses, calls one workflow and prints."""
