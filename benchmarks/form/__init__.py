"""The form in which factors are trained, chosen by measurement in the setting of the paper."""
