"""Tests of lit-merge, a file per source file; references.py holds the slow oracles."""
