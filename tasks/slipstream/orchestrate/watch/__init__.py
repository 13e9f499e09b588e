"""`slipstream run` and `slipstream watch`: start a run, and show it live until it ends."""
