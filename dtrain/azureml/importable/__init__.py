"""A folder for PYTHONPATH: in it, Pythons that a rank or a control script starts find ``azureml`` (see finder.py)."""
