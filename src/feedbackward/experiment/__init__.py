"""The experiment layer: data sets, nets, training, comparison and reports over the core library.

It imports the core; the core never imports it. Install it with `pip install feedbackward[experiment]`.
"""
