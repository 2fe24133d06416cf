"""One file per benchmark: its questions, its reference answers and its grader."""
