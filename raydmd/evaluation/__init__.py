"""What a student is worth: judges, metrics, motion, and the report that shows them."""
