"""How a student learns from a frozen teacher: terms as pure functions, terms by name, the stage that adds them up.

Models are students and teachers as they are; nothing of a teacher is ever part of the student's module.
"""
