"""Sounds: files to waveforms, waveforms to what an encoder takes."""
