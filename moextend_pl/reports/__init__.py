"""Pictures and texts that people look at: plots of usage, shift, losses and answers; the quickstart's report.

Callbacks, commands and notebooks import it; it draws what it is given and runs nothing.
"""
