"""The project is a flat folder: tests import its files from the folder above."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
