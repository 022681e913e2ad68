//! Modules, functions, variables; also the newer names for the same things, libraries and kernels.
//!
//! An image is PTX text. Not here: cubin and fatbin images (machine code cannot be run here), textures and
//! surfaces. Several images become one in [`super::linker`].

use super::call::{Answer, exports, give, give_if_asked, refuse, text};
use super::codes::Code;
use super::graph;
use super::handles;
use super::staged::Staged;
use super::state::{self, Context, DevicePointer, Handle, current, driver};
use crate::exec::LoadedModule;
use crate::memory::Memory;
use crate::ptx::{self, Kernel, Limits};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// A module in a context.
pub struct LoadedImage {
    pub handle: usize,
    pub context: usize,
    pub loaded: LoadedModule,
    unloaded: AtomicBool,
    /// Handles given out so far, by kernel name.
    functions: Mutex<BTreeMap<String, usize>>,
}

/// A kernel of a module.
pub struct Function {
    pub handle: usize,
    pub image: Arc<LoadedImage>,
    pub kernel: Arc<Kernel>,
    /// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
    pub max_dynamic_shared: AtomicU32,
    carveout: AtomicU32,
    /// State set for `cuLaunch` and its relatives.
    pub staged: Mutex<Staged>,
    name: CString,
}

impl LoadedImage {
    pub fn unload(&self, memory: &Memory) {
        if !self.unloaded.swap(true, Ordering::Relaxed) {
            self.loaded.unload(memory);
        }
    }
}

impl Function {
    /// Refuses a kernel whose module has been unloaded; a graph may still hold one.
    pub fn check(&self) -> Answer {
        match self.image.unloaded.load(Ordering::Relaxed) {
            false => Ok(()),
            true => refuse(Code::INVALID_HANDLE, format!("the module of kernel {} was unloaded", self.kernel.name)),
        }
    }

    /// Maximum threads per block of this kernel.
    pub fn max_threads(&self) -> u32 {
        let declared = self.kernel.required_threads.or(self.kernel.max_threads);
        declared.map_or(super::device::MAX_THREADS, |[x, y, z]| {
            x.saturating_mul(y).saturating_mul(z).clamp(1, super::device::MAX_THREADS)
        })
    }
}

/// The text of an image; refuses images that are not text.
///
/// # Safety
/// `image` is null, or points to NUL-terminated text or to an ELF or fatbin image.
pub unsafe fn image_text<'a>(image: *const c_void) -> Answer<&'a str> {
    if image.is_null() {
        return refuse(Code::INVALID_VALUE, "the image is null");
    }
    // Machine code formats start with bytes that text cannot start with. Compared only up to the first difference.
    let starts_with = |magic: &[u8]| {
        // SAFETY: stops at the first difference, so within the image as long as no magic holds a NUL.
        (0..magic.len()).all(|at| unsafe { *image.cast::<u8>().add(at) } == magic[at])
    };
    if starts_with(b"\x7fELF") {
        return refuse(
            Code::NO_BINARY_FOR_GPU,
            "the image is a cubin, machine code that only a GPU runs: load PTX text",
        );
    }
    if starts_with(&0xba55_ed50u32.to_le_bytes()) || starts_with(&0x4662_43b1u32.to_le_bytes()) {
        return refuse(Code::NO_BINARY_FOR_GPU, "the image is a fatbin: load the PTX text itself (nvcc -ptx)");
    }
    // SAFETY: not null, and neither of the binary formats.
    let bytes = unsafe { CStr::from_ptr(image.cast()) };
    bytes.to_str().or_else(|_| refuse(Code::INVALID_IMAGE, "the image is neither PTX text nor a known binary"))
}

/// What the emulated devices accept.
pub fn limits() -> Answer<Limits> {
    let (major, minor) = driver()?.settings.capability;
    Ok(Limits { target: major * 10 + minor, ..Limits::default() })
}

fn load_text(text: &str) -> Answer<Handle> {
    let context = current()?;
    graph::refuse_unsafe_call()?;
    let driver = driver()?;
    if !text.contains(".version") {
        return refuse(Code::INVALID_IMAGE, "the image is no PTX text: it has no .version line");
    }
    let module = match ptx::parse_for(text, limits()?) {
        Ok(module) => Arc::new(module),
        Err(why) => return refuse(Code(why.kind.code() as c_int), why.to_string()),
    };
    let memory = &context.device()?.memory;
    let Some(loaded) = LoadedModule::load(memory, module) else {
        return refuse(Code::OUT_OF_MEMORY, "the module's variables do not fit the device's memory");
    };
    let image = LoadedImage {
        handle: handles::fresh(),
        context: context.handle,
        loaded,
        unloaded: AtomicBool::new(false),
        functions: Mutex::default(),
    };
    Ok(driver.modules.insert(image.handle, Arc::new(image)))
}

/// The text of an image in a file.
pub fn read_image(path: &str) -> Answer<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(why) if why.kind() == std::io::ErrorKind::InvalidData => {
            refuse(Code::NO_BINARY_FOR_GPU, format!("{path} is not text: load PTX"))
        }
        Err(why) => refuse(Code::FILE_NOT_FOUND, format!("{path}: {why}")),
    }
}

const ERROR_LOG: c_int = 5;
const ERROR_LOG_BYTES: c_int = 6;
const INFO_LOG_BYTES: c_int = 4;

/// The error log, the only JIT option that is honoured. Addresses; 0 for none.
#[derive(Default)]
pub struct JitLog {
    log: usize,
    room: usize,
    /// Where the size was passed by value, and the length is returned.
    length_at: usize,
}

impl JitLog {
    /// # Safety
    /// `options` and `values` have `count` elements; the values are what the options call for.
    pub unsafe fn find(count: c_uint, options: *const c_int, values: *mut *mut c_void) -> Answer<JitLog> {
        if count > 0 && (options.is_null() || values.is_null()) {
            return refuse(Code::INVALID_VALUE, "the list of JIT options or of their values is null");
        }
        let mut found = JitLog::default();
        for at in 0..count as usize {
            // SAFETY: `at` is below the count; nothing is written to the information log.
            unsafe {
                let value = values.add(at);
                match options.add(at).read() {
                    ERROR_LOG => found.log = value.read() as usize,
                    ERROR_LOG_BYTES => (found.room, found.length_at) = (value.read() as usize, value as usize),
                    INFO_LOG_BYTES => value.write(std::ptr::null_mut()),
                    _ => (),
                }
            }
        }
        Ok(found)
    }

    /// Writes as much as fits, terminated, and its length.
    ///
    /// # Safety
    /// The log and the values passed to [`JitLog::find`] are still valid.
    pub unsafe fn write(&self, message: &str) {
        let mut written = 0;
        if self.log != 0 && self.room > 0 {
            written = message.len().min(self.room - 1);
            let log = self.log as *mut u8;
            // SAFETY: the log has `room` bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(message.as_ptr(), log, written);
                log.add(written).write(0);
            }
        }
        if self.length_at != 0 {
            // SAFETY: guaranteed by the caller.
            unsafe { (self.length_at as *mut *mut c_void).write(written as *mut c_void) };
        }
    }
}

/// Loads with JIT options, of which only the error log is honoured: a refusal is written there.
///
/// # Safety
/// `options` and `values` have `count` elements; the values are what the options call for.
unsafe fn load_with_options(
    image: *const c_void,
    count: c_uint,
    options: *const c_int,
    values: *mut *mut c_void,
) -> Answer<Handle> {
    // SAFETY: guaranteed by the caller.
    unsafe {
        let log = JitLog::find(count, options, values)?;
        let answer = image_text(image).and_then(load_text);
        log.write(answer.as_ref().err().map_or("", |why| why.message.as_str()));
        answer
    }
}

fn function_of(image: &Arc<LoadedImage>, name: &str) -> Answer<Handle> {
    let driver = driver()?;
    let mut known = image.functions.lock().unwrap();
    if let Some(&handle) = known.get(name) {
        return Ok(handle as Handle);
    }
    let kernels = &image.loaded.module.kernels;
    let Some(kernel) = kernels.iter().find(|kernel| kernel.name == name) else {
        let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        return refuse(Code::NOT_FOUND, format!("the module has no kernel `{name}`; it has: {}", names.join(", ")));
    };
    let function = Function {
        handle: handles::fresh(),
        image: image.clone(),
        kernel: kernel.clone(),
        max_dynamic_shared: AtomicU32::new(super::device::SHARED_WITHOUT_OPT_IN.saturating_sub(kernel.static_shared)),
        carveout: AtomicU32::new(u32::MAX),
        staged: Mutex::default(),
        name: CString::new(name).unwrap_or_default(),
    };
    known.insert(name.to_string(), function.handle);
    Ok(driver.functions.insert(function.handle, Arc::new(function)))
}

/// # Safety
/// `address` and `bytes` are null or valid for writes.
unsafe fn variable(image: Handle, name: &str, address: *mut DevicePointer, bytes: *mut usize) -> Answer {
    let image = driver()?.modules.get(image)?;
    match image.loaded.global(name) {
        Some((at, size)) => {
            // SAFETY: guaranteed by the caller.
            unsafe {
                give_if_asked(address, at);
                give_if_asked(bytes, size as usize);
            }
            Ok(())
        }
        None => refuse(Code::NOT_FOUND, format!("the module has no variable `{name}`")),
    }
}

fn unload(handle: Handle) -> Answer {
    let driver = driver()?;
    graph::refuse_unsafe_call()?;
    let image = driver.modules.remove(handle)?;
    let context: Arc<Context> = driver.contexts.get(image.context as Handle)?;
    super::stream::settle_all(&context)?;
    super::order::host_waited_for_all(&context)?;
    driver.functions.take(|function| function.image.handle == image.handle);
    image.unload(&context.device()?.memory);
    context.check()
}

const MAX_THREADS_PER_BLOCK: c_int = 0;
const SHARED_SIZE: c_int = 1;
const CONST_SIZE: c_int = 2;
const LOCAL_SIZE: c_int = 3;
const NUM_REGS: c_int = 4;
const PTX_VERSION: c_int = 5;
const BINARY_VERSION: c_int = 6;
const CACHE_MODE_CA: c_int = 7;
const MAX_DYNAMIC_SHARED: c_int = 8;
const CARVEOUT: c_int = 9;
/// Clusters and what else came after compute capability 8.0: all zero.
const NEWER: std::ops::RangeInclusive<c_int> = 10..=16;

fn attribute_of(function: &Function, attribute: c_int) -> Answer<c_int> {
    let kernel = &function.kernel;
    let module = &function.image.loaded.module;
    let (major, minor) = driver()?.settings.capability;
    Ok(match attribute {
        MAX_THREADS_PER_BLOCK => function.max_threads() as c_int,
        SHARED_SIZE => kernel.static_shared as c_int,
        CONST_SIZE => kernel.const_bytes as c_int,
        LOCAL_SIZE => kernel.local_bytes as c_int,
        NUM_REGS => super::occupancy::registers_of(kernel) as c_int,
        PTX_VERSION => module.target as c_int,
        BINARY_VERSION => (major * 10 + minor) as c_int,
        CACHE_MODE_CA => 0,
        MAX_DYNAMIC_SHARED => function.max_dynamic_shared.load(Ordering::Relaxed) as c_int,
        CARVEOUT => function.carveout.load(Ordering::Relaxed) as c_int,
        attribute if NEWER.contains(&attribute) => 0,
        _ => {
            return refuse(Code::INVALID_VALUE, format!("function attribute {attribute} is not known"));
        }
    })
}

fn set_attribute(function: &Function, attribute: c_int, value: c_int) -> Answer {
    match attribute {
        MAX_DYNAMIC_SHARED => {
            let device = state::device(driver()?.contexts.get(function.image.context as Handle)?.device)?;
            let most = super::device::figures(device).shared_per_block_opt_in;
            let fixed = function.kernel.static_shared;
            match u32::try_from(value) {
                Ok(bytes) if bytes.saturating_add(fixed) <= most => {
                    function.max_dynamic_shared.store(bytes, Ordering::Relaxed);
                    Ok(())
                }
                _ => refuse(
                    Code::INVALID_VALUE,
                    format!(
                        "kernel {} cannot have {value} bytes of dynamic shared memory: with its {fixed} static bytes \
                         the device allows {most}",
                        function.kernel.name
                    ),
                ),
            }
        }
        CARVEOUT if (-1..=100).contains(&value) => {
            function.carveout.store(value as u32, Ordering::Relaxed);
            Ok(())
        }
        CARVEOUT => refuse(Code::INVALID_VALUE, format!("the carveout must be -1 or a percentage, not {value}")),
        _ => refuse(Code::INVALID_VALUE, format!("function attribute {attribute} cannot be set")),
    }
}

exports! { MODULE:
    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        give(module, load_text(&read_image(text(path, "the path")?)?)?, "the module")
    }

    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) {
        give(module, image_text(image).and_then(load_text)?, "the module")
    }

    fn cuModuleLoadDataEx(
        module: *mut Handle, image: *const c_void, count: c_uint, options: *const c_int, values: *mut *mut c_void,
    ) {
        give(module, load_with_options(image, count, options, values)?, "the module")
    }

    fn cuModuleLoadFatBinary(module: *mut Handle, image: *const c_void) {
        give(module, image_text(image).and_then(load_text)?, "the module")
    }

    fn cuModuleUnload(module: Handle) {
        unload(module)
    }

    fn cuModuleGetLoadingMode(mode: *mut c_int) {
        const EAGER: c_int = 1;
        give(mode, EAGER, "the mode")
    }

    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        let image = driver()?.modules.get(module)?;
        give(function, function_of(&image, text(name, "the name")?)?, "the function")
    }

    fn cuModuleGetFunctionCount(count: *mut c_uint, module: Handle) {
        let image = driver()?.modules.get(module)?;
        give(count, image.loaded.module.kernels.len() as c_uint, "the count")
    }

    fn cuModuleEnumerateFunctions(functions: *mut Handle, count: c_uint, module: Handle) {
        let image = driver()?.modules.get(module)?;
        for (at, kernel) in image.loaded.module.kernels.iter().take(count as usize).enumerate() {
            give(functions.add(at), function_of(&image, &kernel.name)?, "the functions")?;
        }
        Ok(())
    }

    fn cuModuleGetGlobal_v2(address: *mut DevicePointer, bytes: *mut usize, module: Handle, name: *const c_char) {
        variable(module, text(name, "the name")?, address, bytes)
    }

    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Handle) {
        give(value, attribute_of(&*driver()?.functions.get(function)?, attribute)?, "the value")
    }

    fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) {
        set_attribute(&*driver()?.functions.get(function)?, attribute, value)
    }

    fn cuFuncSetCacheConfig(function: Handle, config: c_int) {
        driver()?.functions.get(function)?;
        super::context::check_cache_config(config)
    }

    fn cuFuncSetSharedMemConfig(function: Handle, config: c_int) {
        driver()?.functions.get(function)?;
        super::context::check_shared_config(config)
    }

    fn cuFuncGetModule(module: *mut Handle, function: Handle) {
        let function = driver()?.functions.get(function)?;
        give(module, function.image.handle as Handle, "the module")
    }

    fn cuFuncGetName(name: *mut *const c_char, function: Handle) {
        // The name lives as long as the function, as the manual says.
        give(name, driver()?.functions.get(function)?.name.as_ptr(), "the name")
    }

    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        let function = driver()?.functions.get(function)?;
        let Some(param) = function.kernel.params.get(index) else {
            let count = function.kernel.params.len();
            let why = format!("kernel {} has {count} parameters, none with index {index}", function.kernel.name);
            return refuse(Code::INVALID_VALUE, why);
        };
        give(offset, param.offset as usize, "the offset")?;
        give_if_asked(bytes, param.bytes as usize);
        Ok(())
    }

    fn cuFuncGetParamCount(function: Handle, count: *mut usize) {
        give(count, driver()?.functions.get(function)?.kernel.params.len(), "the count")
    }

    fn cuFuncIsLoaded(state: *mut c_int, function: Handle) {
        driver()?.functions.get(function)?;
        give(state, 1, "the state")
    }

    fn cuFuncLoad(function: Handle) {
        driver()?.functions.get(function).map(|_| ())
    }

    fn cuLibraryLoadData(
        library: *mut Handle, image: *const c_void, options: *const c_int, values: *mut *mut c_void, count: c_uint,
        library_options: *const c_int, library_values: *mut *mut c_void, library_count: c_uint,
    ) {
        let _ = (library_options, library_values, library_count);
        give(library, load_with_options(image, count, options, values)?, "the library")
    }

    fn cuLibraryLoadFromFile(
        library: *mut Handle, path: *const c_char, options: *const c_int, values: *mut *mut c_void, count: c_uint,
        library_options: *const c_int, library_values: *mut *mut c_void, library_count: c_uint,
    ) {
        let _ = (options, values, count, library_options, library_values, library_count);
        give(library, load_text(&read_image(text(path, "the path")?)?)?, "the library")
    }

    fn cuLibraryUnload(library: Handle) {
        unload(library)
    }

    fn cuLibraryGetKernel(kernel: *mut Handle, library: Handle, name: *const c_char) {
        let image = driver()?.modules.get(library)?;
        give(kernel, function_of(&image, text(name, "the name")?)?, "the kernel")
    }

    fn cuLibraryGetKernelCount(count: *mut c_uint, library: Handle) {
        let image = driver()?.modules.get(library)?;
        give(count, image.loaded.module.kernels.len() as c_uint, "the count")
    }

    fn cuLibraryEnumerateKernels(kernels: *mut Handle, count: c_uint, library: Handle) {
        let image = driver()?.modules.get(library)?;
        for (at, kernel) in image.loaded.module.kernels.iter().take(count as usize).enumerate() {
            give(kernels.add(at), function_of(&image, &kernel.name)?, "the kernels")?;
        }
        Ok(())
    }

    fn cuLibraryGetModule(module: *mut Handle, library: Handle) {
        let image = driver()?.modules.get(library)?;
        give(module, image.handle as Handle, "the module")
    }

    fn cuLibraryGetGlobal(address: *mut DevicePointer, bytes: *mut usize, library: Handle, name: *const c_char) {
        variable(library, text(name, "the name")?, address, bytes)
    }

    fn cuKernelGetFunction(function: *mut Handle, kernel: Handle) {
        let kernel = driver()?.functions.get(kernel)?;
        give(function, kernel.handle as Handle, "the function")
    }

    fn cuKernelGetLibrary(library: *mut Handle, kernel: Handle) {
        let kernel = driver()?.functions.get(kernel)?;
        give(library, kernel.image.handle as Handle, "the library")
    }

    fn cuKernelGetName(name: *mut *const c_char, kernel: Handle) {
        give(name, driver()?.functions.get(kernel)?.name.as_ptr(), "the name")
    }

    fn cuKernelGetAttribute(value: *mut c_int, attribute: c_int, kernel: Handle, device: c_int) {
        state::device(device)?;
        give(value, attribute_of(&*driver()?.functions.get(kernel)?, attribute)?, "the value")
    }

    fn cuKernelSetAttribute(attribute: c_int, value: c_int, kernel: Handle, device: c_int) {
        state::device(device)?;
        set_attribute(&*driver()?.functions.get(kernel)?, attribute, value)
    }

    fn cuKernelSetCacheConfig(kernel: Handle, config: c_int, device: c_int) {
        state::device(device)?;
        driver()?.functions.get(kernel)?;
        super::context::check_cache_config(config)
    }

    fn cuKernelGetParamCount(kernel: Handle, count: *mut usize) {
        give(count, driver()?.functions.get(kernel)?.kernel.params.len(), "the count")
    }

    fn cuKernelGetParamInfo(kernel: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        let function = driver()?.functions.get(kernel)?;
        let Some(param) = function.kernel.params.get(index) else {
            return refuse(Code::INVALID_VALUE, format!("kernel {} has no parameter {index}", function.kernel.name));
        };
        give(offset, param.offset as usize, "the offset")?;
        give_if_asked(bytes, param.bytes as usize);
        Ok(())
    }
}
