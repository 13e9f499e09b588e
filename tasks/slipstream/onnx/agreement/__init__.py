"""Agreement across formats: after each conversion the new form must answer real samples like the old one.

`bounds` determines how far apart two answers may be, `reference` runs an ONNX file as written, and `layers` names the
first layer that diverges when a bound is exceeded. Accuracy and speed are left to the gates: this only distinguishes a
broken conversion from an imprecise one, before time is spent on it.
"""
