"""The cloud as the device sees it: channels, identity, and calls that are retried."""
