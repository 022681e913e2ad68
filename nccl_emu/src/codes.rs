//! `ncclResult_t`, and refusals: a code with one sentence.

use std::ffi::{CStr, c_int};

/// An `ncclResult_t`. A transparent integer, because a caller may hand any number to `ncclGetErrorString`.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Code(pub c_int);

impl Code {
    pub const SUCCESS: Code = Code(0);
    /// A call of the CUDA driver failed.
    pub const CUDA: Code = Code(1);
    pub const SYSTEM: Code = Code(2);
    /// A fault of this library.
    pub const INTERNAL: Code = Code(3);
    pub const ARGUMENT: Code = Code(4);
    pub const USAGE: Code = Code(5);
    /// Another rank is gone.
    pub const REMOTE: Code = Code(6);
    pub const IN_PROGRESS: Code = Code(7);
    const TIMEOUT: Code = Code(8);

    /// The text of `ncclGetErrorString`, as NCCL has it.
    pub fn text(self) -> &'static CStr {
        match self {
            Code::SUCCESS => c"no error",
            Code::CUDA => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
            Code::SYSTEM => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
            Code::INTERNAL => c"internal error - please report this issue to the NCCL developers",
            Code::ARGUMENT => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
            Code::USAGE => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
            Code::REMOTE => c"remote process exited or there was a network error",
            Code::IN_PROGRESS => c"NCCL operation in progress",
            Code::TIMEOUT => c"timeout",
            _ => c"unknown result code",
        }
    }
}

/// Why a call fails: the code to return, and one sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
}

pub type Answer<T = ()> = Result<T, Refusal>;

pub fn refuse<T>(code: Code, message: impl Into<String>) -> Answer<T> {
    Err(refusal(code, message))
}

pub fn refusal(code: Code, message: impl Into<String>) -> Refusal {
    Refusal { code, message: message.into() }
}
