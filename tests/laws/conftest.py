from conftest_laws import _one_thread_no_grad, any_model, bf16_model, some_model

__all__ = ["_one_thread_no_grad", "any_model", "bf16_model", "some_model"]
