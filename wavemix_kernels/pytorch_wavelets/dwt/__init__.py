"""The decimated and the undecimated discrete wavelet transform."""
