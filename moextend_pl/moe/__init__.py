"""The extension itself: finding blocks, growing experts, routing, usage and the selection of layers."""
