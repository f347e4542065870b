"""The drop-ins for DeepEP's buffers. The only folder that names `deep_ep`."""
