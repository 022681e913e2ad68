//! Shared by all exported functions: the guard around their bodies, refusals, the table of exports.
//!
//! Invariant: no panic leaves an exported function. A panic inside is a bug of the emulator; the caller sees
//! CUDA_ERROR_UNKNOWN and the panic's text.

use super::codes::Code;
use super::settings::{self, Log};
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a call fails: the code to return, and one sentence for stderr.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
}

/// The result of an exported function's body.
pub type Answer<T = ()> = Result<T, Refusal>;

pub fn refuse<T>(code: Code, message: impl Into<String>) -> Answer<T> {
    Err(Refusal { code, message: message.into() })
}

/// One exported function, for `cuGetProcAddress`.
pub struct Export {
    pub name: &'static str,
    pub address: *const (),
}

// SAFETY: the address of a function is a constant; nothing is ever read through it here.
unsafe impl Sync for Export {}

// No thread-local of this crate has a destructor. Programs call the driver from destructors of their own thread-locals,
// when one with a destructor might already be gone. Each thread leaks a few bytes instead.
thread_local! {
    /// The sentence of this thread's last failed call.
    static LAST_MESSAGE: RefCell<ManuallyDrop<CString>> = RefCell::default();
    /// This thread is inside a host function of a stream, where driver calls are not permitted.
    static IN_HOST_FUNCTION: Cell<bool> = const { Cell::new(false) };
}

/// Runs the body of the exported function `name` and converts its result into a code.
pub fn guard(name: &'static str, body: impl FnOnce() -> Answer) -> Code {
    if IN_HOST_FUNCTION.get() && !name.starts_with("emu_") {
        return report(
            name,
            Refusal {
                code: Code::NOT_PERMITTED,
                message: "a host function called by a stream must not call the driver".into(),
            },
        );
    }
    if settings::log() == Log::Calls {
        eprintln!("cuda_emu: {name}");
    }
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => Code::SUCCESS,
        Ok(Err(refusal)) => report(name, refusal),
        Err(payload) => {
            let text = payload
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| payload.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            report(
                name,
                Refusal {
                    code: Code::UNKNOWN,
                    message: format!("the emulator itself failed, please report it: {text}"),
                },
            )
        }
    }
}

/// Keeps the sentence for `emu_last_message` and prints it. NOT_READY is an answer, not a failure, and is not printed;
/// nor is what programs probe with `cuGetProcAddress`.
fn report(name: &str, refusal: Refusal) -> Code {
    let answer = refusal.code == Code::NOT_READY || name.starts_with("cuGetProcAddress");
    if !answer && settings::log() != Log::None {
        eprintln!("cuda_emu: {name}: {}: {}", refusal.code, refusal.message);
    }
    let text = format!("{name}: {}", refusal.message).replace('\0', " ");
    LAST_MESSAGE.with_borrow_mut(|last| **last = CString::new(text).unwrap_or_default());
    refusal.code
}

/// Runs `work` as a host function: every driver call inside is refused.
pub fn as_host_function(work: impl FnOnce()) {
    IN_HOST_FUNCTION.set(true);
    work();
    IN_HOST_FUNCTION.set(false);
}

/// The sentence of this thread's last failed call; valid until its next one.
pub fn last_message() -> *const c_char {
    LAST_MESSAGE.with_borrow(|text| text.as_ptr())
}

/// Writes a result to the caller's pointer; null is refused.
///
/// # Safety
/// `place` is null or valid for a write.
pub unsafe fn give<T>(place: *mut T, value: T, what: &str) -> Answer {
    if place.is_null() {
        return refuse(Code::INVALID_VALUE, format!("the pointer for {what} is null"));
    }
    // SAFETY: not null, so valid as the caller guarantees.
    unsafe { place.write_unaligned(value) };
    Ok(())
}

/// As [`give`], for optional results: null is allowed.
///
/// # Safety
/// `place` is null or valid for a write.
pub unsafe fn give_if_asked<T>(place: *mut T, value: T) {
    if !place.is_null() {
        // SAFETY: not null, so valid as the caller guarantees.
        unsafe { place.write_unaligned(value) };
    }
}

/// Reads a NUL-terminated name.
///
/// # Safety
/// `text` is null or points to a NUL-terminated string that outlives the result.
pub unsafe fn text<'a>(text: *const c_char, what: &str) -> Answer<&'a str> {
    if text.is_null() {
        return refuse(Code::INVALID_VALUE, format!("{what} is null"));
    }
    // SAFETY: not null, so NUL-terminated as the caller guarantees.
    let bytes = unsafe { CStr::from_ptr(text) };
    bytes.to_str().or_else(|_| refuse(Code::INVALID_VALUE, format!("{what} is not UTF-8: {bytes:?}")))
}

/// Declares exported functions: `exports! { TABLE: fn cuName(arg: Type) { body -> Answer } ... }`.
///
/// Every function becomes an unmangled `extern "C" fn` whose body runs inside [`guard`], and a row of `TABLE`.
macro_rules! exports {
    ($table:ident: $( $(#[$attr:meta])* fn $name:ident ( $($arg:ident : $ty:ty),* $(,)? ) $body:block )*) => {
        $(
            $(#[$attr])*
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe, reason = "some bodies touch none of the caller's pointers")]
            #[allow(clippy::too_many_arguments, reason = "the driver API decides the arguments")]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> $crate::driver::codes::Code {
                $crate::driver::call::guard(stringify!($name), || {
                    // SAFETY: the caller guarantees the pointers that it passes, as the driver API's manual
                    // demands; the bodies check for null wherever a program could pass it by mistake.
                    unsafe { $body }
                })
            }
        )*
        pub(in $crate::driver) static $table: &[$crate::driver::call::Export] =
            &[$($crate::driver::call::Export { name: stringify!($name), address: $name as *const () }),*];
    };
}
pub(super) use exports;
