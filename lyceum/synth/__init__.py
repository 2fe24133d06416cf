"""Models and rules that write data: lessons and rankings."""
