"""What only the book needs: its models, tasks, figures and exercises."""
