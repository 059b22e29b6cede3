"""Will it fit, how long does it take, and where should the teacher be: answers before a run, from its recipe alone."""
