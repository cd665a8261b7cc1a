"""What a model does: its predictions, a report of them, and its export."""
