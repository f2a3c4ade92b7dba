"""Drawn pictures, questions with exact answers, and the accuracy of an engine on them."""
