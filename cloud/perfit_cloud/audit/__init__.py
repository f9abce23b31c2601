"""Looking from outside for what a server should have forgotten: `perfit-cloud audit`."""
