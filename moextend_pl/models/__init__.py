"""What computes: tower, projector, language model and their whole (`moextend`); what they leave behind (`delta`).

The four classes are imported from `moextend_pl` itself; files of a model import all rooms above, none below.
"""
