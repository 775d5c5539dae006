"""The whole method on real pictures, from nothing, in minutes: its steps, and what is measured of them.

Runs stages through the command line; nothing imports it.
"""
