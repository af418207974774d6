"""One picture on several processes: each rank runs some branches of the guided batch."""
