"""The command `perfit-cloud`: it parses and prints. Without the extra it says what to install."""
