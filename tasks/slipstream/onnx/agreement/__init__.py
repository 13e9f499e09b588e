"""Agreement across formats: after each conversion the new form must answer real samples as the old one does.

`bounds` says how far apart two answers may be, `reference` runs an ONNX file as it is written, and `layers` names the
first layer that departs when a bound is exceeded. What a gate judges (accuracy, speed) is not decided here: this only
tells a broken conversion from an imprecise one, before time is spent on it.
"""
