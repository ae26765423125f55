"""The demo: a real small model and data whose answers a program can check."""
