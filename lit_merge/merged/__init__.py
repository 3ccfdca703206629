"""What a merge yields: the network with heads and corrections, its folder, and how it learns."""
