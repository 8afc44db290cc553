"""Calibration: closed forms and a grid fit the far kernel of every key head, and say which heads should stay exact."""
