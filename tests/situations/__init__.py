"""What people met with other tools, as they reported it, met with this package.

Each test names the report it replays, tells the situation in our own words, and asserts what is right.
"""
