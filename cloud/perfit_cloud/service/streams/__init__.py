"""The two calls that hold state for the length of one stream: Ask and Adapt."""
