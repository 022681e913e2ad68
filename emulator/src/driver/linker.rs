//! The driver's linker: `cuLink...`.
//!
//! Images are PTX text, and so is the result, which `cuModuleLoadData` accepts. Not here: cubins, fatbins, objects and
//! libraries (machine code), and NVVM.

use super::call::{Answer, Refusal, exports, give, give_if_asked, refuse, text};
use super::codes::Code;
use super::handles;
use super::module::{JitLog, image_text, limits, read_image};
use super::state::{Handle, current, driver};
use crate::ptx::{self, Image};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

/// A link in progress.
pub struct Link {
    pub context: usize,
    log: JitLog,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Names and texts.
    images: Vec<(String, String)>,
    linked: Option<CString>,
}

const INPUT_CUBIN: c_int = 0;
const INPUT_PTX: c_int = 1;
const INPUT_LIBRARY: c_int = 4;
/// The one library that is known, by name; the text here replaces the file.
const DEVICE_RUNTIME: &str = "cudadevrt";
const DEVICE_RUNTIME_PTX: &str = include_str!("device_runtime.ptx");
const INPUTS: [&str; 6] = ["cubin", "PTX", "fatbin", "object", "library", "NVVM"];

impl Link {
    /// Writes a refusal to the link's error log and returns it.
    fn logged<T>(&self, answer: Answer<T>) -> Answer<T> {
        let message = answer.as_ref().err().map_or("", |why| why.message.as_str());
        // SAFETY: the manual makes the program that created the link keep its log as long as the link.
        unsafe { self.log.write(message) };
        answer
    }

    fn add(&self, name: &str, text: &str) -> Answer {
        let mut state = self.state.lock().unwrap();
        if state.linked.is_some() {
            return refuse(Code::INVALID_VALUE, "the link is complete, nothing can be added to it");
        }
        if !text.contains(".version") {
            return refuse(Code::INVALID_IMAGE, format!("image {name} is no PTX text: it has no .version line"));
        }
        state.images.push((name.into(), text.into()));
        Ok(())
    }

    fn add_device_runtime(&self) -> Answer {
        let known = self.state.lock().unwrap().images.iter().any(|(name, _)| name == DEVICE_RUNTIME);
        match known {
            true => Ok(()),
            false => self.add(DEVICE_RUNTIME, DEVICE_RUNTIME_PTX),
        }
    }

    /// Links all images. Returns address and size of the result.
    fn complete(&self) -> Answer<(*const c_char, usize)> {
        let mut state = self.state.lock().unwrap();
        if state.linked.is_none() {
            // Naming the device runtime without using it changes nothing.
            let runtime = state.images.iter().any(|(name, text)| name != DEVICE_RUNTIME && text.contains("cudaCG"));
            let wanted = state.images.iter().filter(|(name, _)| runtime || name != DEVICE_RUNTIME);
            let images: Vec<Image> = wanted.map(|(name, text)| Image { name, text }).collect();
            if images.is_empty() {
                return refuse(Code::INVALID_VALUE, "no image was added to the link");
            }
            let wrong =
                |why: ptx::ParseError| Refusal { code: Code(why.kind.code() as c_int), message: why.to_string() };
            let linked = ptx::link(&images).map_err(wrong)?;
            ptx::parse_for(&linked, limits()?).map_err(wrong)?;
            let Ok(linked) = CString::new(linked) else {
                return refuse(Code::INVALID_IMAGE, "the text has a zero byte inside");
            };
            state.linked = Some(linked);
        }
        // The text stays in place until the link is destroyed. The size includes the terminator, so that a copy is
        // terminated too.
        let linked = state.linked.as_deref().unwrap_or_default();
        Ok((linked.as_ptr(), linked.count_bytes() + 1))
    }
}

/// Only text can be linked, including the result of an earlier link, which programs take for a cubin.
fn check_input(kind: c_int) -> Answer {
    match kind {
        INPUT_PTX | INPUT_CUBIN => Ok(()),
        INPUT_LIBRARY => {
            refuse(Code::NOT_SUPPORTED, format!("linking of libraries other than {DEVICE_RUNTIME} is not emulated"))
        }
        _ => match usize::try_from(kind).ok().and_then(|at| INPUTS.get(at)) {
            Some(name) => {
                refuse(Code::NOT_SUPPORTED, format!("linking of {name} images is not emulated: add PTX text"))
            }
            None => refuse(Code::INVALID_VALUE, format!("{kind} is no kind of image")),
        },
    }
}

/// # Safety
/// As the exported functions.
unsafe fn create(count: c_uint, options: *const c_int, values: *mut *mut c_void, link_out: *mut Handle) -> Answer {
    let context = current()?.handle;
    // SAFETY: guaranteed by the caller; the manual makes it keep options and values as long as the link.
    unsafe {
        let log = JitLog::find(count, options, values)?;
        let handle = handles::fresh();
        let link = Arc::new(Link { context, log, state: Mutex::default() });
        give(link_out, handle as Handle, "the link")?;
        driver()?.links.insert(handle, link);
    }
    Ok(())
}

/// # Safety
/// As the exported functions: `data` has `size` bytes.
unsafe fn add_data(link: Handle, kind: c_int, data: *const c_void, size: usize, name: *const c_char) -> Answer {
    let link = driver()?.links.get(link)?;
    link.logged((|| {
        // SAFETY: guaranteed by the caller.
        let name = if name.is_null() { "<unnamed>" } else { unsafe { text(name, "the name")? } };
        if kind == INPUT_LIBRARY && name.contains(DEVICE_RUNTIME) {
            return link.add_device_runtime();
        }
        check_input(kind)?;
        if data.is_null() || size == 0 {
            return refuse(Code::INVALID_VALUE, "the image is null or has no bytes");
        }
        // SAFETY: guaranteed by the caller.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size) };
        let length = bytes.iter().position(|&byte| byte == 0).unwrap_or(size);
        let copy = CString::new(&bytes[..length]).unwrap_or_default();
        // SAFETY: a terminated copy.
        let text = unsafe { image_text(copy.as_ptr().cast())? };
        link.add(name, text)
    })())
}

/// # Safety
/// As the exported functions.
unsafe fn add_file(link: Handle, kind: c_int, path: *const c_char) -> Answer {
    let link = driver()?.links.get(link)?;
    link.logged((|| {
        // SAFETY: guaranteed by the caller.
        let path = unsafe { text(path, "the path")? };
        if kind == INPUT_LIBRARY && path.contains(DEVICE_RUNTIME) {
            return link.add_device_runtime();
        }
        check_input(kind)?;
        link.add(path, &read_image(path)?)
    })())
}

exports! { LINKER:
    fn cuLinkCreate(count: c_uint, options: *const c_int, values: *mut *mut c_void, link: *mut Handle) {
        create(count, options, values, link)
    }

    fn cuLinkCreate_v2(count: c_uint, options: *const c_int, values: *mut *mut c_void, link: *mut Handle) {
        create(count, options, values, link)
    }

    fn cuLinkAddData(
        link: Handle, kind: c_int, data: *const c_void, size: usize, name: *const c_char, count: c_uint,
        options: *const c_int, values: *mut *mut c_void,
    ) {
        let _ = (count, options, values);
        add_data(link, kind, data, size, name)
    }

    fn cuLinkAddData_v2(
        link: Handle, kind: c_int, data: *const c_void, size: usize, name: *const c_char, count: c_uint,
        options: *const c_int, values: *mut *mut c_void,
    ) {
        let _ = (count, options, values);
        add_data(link, kind, data, size, name)
    }

    fn cuLinkAddFile(
        link: Handle, kind: c_int, path: *const c_char, count: c_uint, options: *const c_int, values: *mut *mut c_void,
    ) {
        let _ = (count, options, values);
        add_file(link, kind, path)
    }

    fn cuLinkAddFile_v2(
        link: Handle, kind: c_int, path: *const c_char, count: c_uint, options: *const c_int, values: *mut *mut c_void,
    ) {
        let _ = (count, options, values);
        add_file(link, kind, path)
    }

    fn cuLinkComplete(link: Handle, image: *mut *const c_char, size: *mut usize) {
        let link = driver()?.links.get(link)?;
        let (linked, bytes) = link.logged(link.complete())?;
        give(image, linked, "the image")?;
        give_if_asked(size, bytes);
        Ok(())
    }

    fn cuLinkDestroy(link: Handle) {
        driver()?.links.remove(link).map(|_| ())
    }
}
