"""Which sample comes when, and its pixels."""
