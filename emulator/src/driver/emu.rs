//! The emulator's own exports. They are declared and documented in `include/cuda_emu.h`.

use super::call::{exports, give, last_message, refuse, text};
use super::codes::Code;
use super::profile;
use super::settings;
use super::state::driver;
use std::ffi::c_char;

/// The two-step protocol of all texts: `*bytes` is the room before the call, and the length including the terminator
/// after it. What does not fit is cut.
///
/// # Safety
/// `place` is null or has `*bytes` bytes; `bytes` is null or valid.
unsafe fn give_text(place: *mut c_char, bytes: *mut usize, what: &str) -> super::call::Answer {
    if bytes.is_null() {
        return refuse(Code::INVALID_VALUE, "the pointer for the length is null");
    }
    // SAFETY: guaranteed by the caller.
    unsafe {
        let room = bytes.read();
        if !place.is_null() && room > 0 {
            let length = what.len().min(room - 1);
            std::ptr::copy_nonoverlapping(what.as_ptr().cast(), place, length);
            place.add(length).write(0);
        }
        give(bytes, what.len() + 1, "the length")
    }
}

/// The version of the emulator as text. A program that finds this symbol knows that its driver is the emulator.
#[unsafe(no_mangle)]
pub extern "C" fn emu_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Why the last call of this thread that failed did; valid until its next failure.
#[unsafe(no_mangle)]
pub extern "C" fn emu_last_message() -> *const c_char {
    last_message()
}

exports! { EMU:
    fn emu_configure(name: *const c_char, value: *const c_char) {
        let defaults = &driver()?.settings.run;
        let name = text(name, "the name")?;
        let value = if value.is_null() { None } else { Some(text(value, "the value")?) };
        settings::configure(defaults, name, value).or_else(|why| refuse(Code::INVALID_VALUE, why))
    }

    fn emu_profile_json(place: *mut c_char, bytes: *mut usize) {
        give_text(place, bytes, &profile::as_json(driver()?))
    }

    fn emu_last_launch_json(place: *mut c_char, bytes: *mut usize) {
        driver()?;
        give_text(place, bytes, &profile::last_launch_as_json())
    }

    fn emu_profile_reset() {
        profile::reset(driver()?);
        Ok(())
    }

    fn emu_profile_write() {
        profile::write(driver()?);
        Ok(())
    }
}
