//! cudarc's view of the driver. In a build without the feature `cuda`, a stand-in for a driver that is never there: its
//! types have no values, so everything built on them compiles, no [`Gpu`](super::Gpu) can exist, and the rest of the
//! crate rarely needs to ask which build it is in.

#[cfg(feature = "cuda")]
pub use cudarc::driver::{
    CudaContext, CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, result, sys,
};

#[cfg(not(feature = "cuda"))]
pub use absent::{
    CudaContext, CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, result, sys,
};

/// The part of cudarc that this crate uses, under the same names.
#[cfg(not(feature = "cuda"))]
mod absent {
    use std::ffi::CStr;
    use std::marker::PhantomData;
    use std::sync::Arc;

    type Result<T> = std::result::Result<T, DriverError>;

    /// No device, whatever is asked.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DriverError(pub sys::CUresult);

    const NO_DEVICE: DriverError = DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE);

    impl DriverError {
        pub fn error_name(&self) -> Result<&CStr> {
            Err(NO_DEVICE)
        }
        pub fn error_string(&self) -> Result<&CStr> {
            Err(NO_DEVICE)
        }
    }

    pub enum CudaContext {}
    pub enum CudaStream {}
    pub enum CudaEvent {}
    pub enum CudaGraph {}
    pub struct CudaSlice<T>(CudaContext, PhantomData<T>);
    pub struct PinnedHostSlice<T>(CudaContext, PhantomData<T>);

    pub trait DevicePtr {
        fn device_ptr(&self, stream: &CudaStream) -> (sys::CUdeviceptr, ());
    }

    impl<T> DevicePtr for CudaSlice<T> {
        fn device_ptr(&self, _stream: &CudaStream) -> (sys::CUdeviceptr, ()) {
            match self.0 {}
        }
    }

    impl CudaContext {
        pub fn new(_number: usize) -> Result<Arc<Self>> {
            Err(NO_DEVICE)
        }
        pub unsafe fn disable_event_tracking(&self) {
            match *self {}
        }
        pub fn new_stream(&self) -> Result<Arc<CudaStream>> {
            match *self {}
        }
        pub fn cu_device(&self) -> sys::CUdevice {
            match *self {}
        }
        pub fn new_event(&self, _flags: Option<sys::CUevent_flags>) -> Result<CudaEvent> {
            match *self {}
        }
        pub unsafe fn alloc_pinned<T>(&self, _len: usize) -> Result<PinnedHostSlice<T>> {
            match *self {}
        }
        pub fn mem_get_info(&self) -> Result<(usize, usize)> {
            match *self {}
        }
        pub fn bind_to_thread(&self) -> Result<()> {
            match *self {}
        }
        pub fn record_err<T>(&self, _result: Result<T>) {
            match *self {}
        }
    }

    impl CudaStream {
        pub fn context(&self) -> &Arc<CudaContext> {
            match *self {}
        }
        pub fn cu_stream(&self) -> sys::CUstream {
            match *self {}
        }
        pub fn synchronize(&self) -> Result<()> {
            match *self {}
        }
        pub fn wait(&self, _event: &CudaEvent) -> Result<()> {
            match *self {}
        }
        pub unsafe fn alloc<T>(&self, _len: usize) -> Result<CudaSlice<T>> {
            match *self {}
        }
        pub fn clone_dtoh<T>(&self, _slice: &CudaSlice<T>) -> Result<Vec<T>> {
            match *self {}
        }
        pub fn begin_capture(&self, _mode: sys::CUstreamCaptureMode) -> Result<()> {
            match *self {}
        }
        pub fn end_capture(self: &Arc<Self>, _flags: sys::CUgraphInstantiate_flags) -> Result<Option<CudaGraph>> {
            match **self {}
        }
    }

    impl CudaGraph {
        pub fn launch(&self) -> Result<()> {
            match *self {}
        }
    }

    impl CudaEvent {
        pub fn record(&self, _stream: &CudaStream) -> Result<()> {
            match *self {}
        }
        pub fn synchronize(&self) -> Result<()> {
            match *self {}
        }
        pub fn try_is_complete(&self) -> Result<bool> {
            match *self {}
        }
        pub fn elapsed_ms(&self, _end: &Self) -> Result<f32> {
            match *self {}
        }
    }

    impl<T> CudaSlice<T> {
        pub fn len(&self) -> usize {
            match self.0 {}
        }
    }

    impl<T> PinnedHostSlice<T> {
        pub fn context(&self) -> &Arc<CudaContext> {
            match self.0 {}
        }
        pub fn len(&self) -> usize {
            match self.0 {}
        }
        pub fn as_mut_ptr(&mut self) -> Result<*mut T> {
            match self.0 {}
        }
        pub fn as_mut_slice(&mut self) -> Result<&mut [T]> {
            match self.0 {}
        }
    }

    pub mod result {
        use std::ffi::{CString, c_void};

        use super::{NO_DEVICE, Result, sys};

        pub fn init() -> Result<()> {
            Err(NO_DEVICE)
        }
        pub unsafe fn memcpy_htod_async<T>(_to: sys::CUdeviceptr, _from: &[T], _stream: sys::CUstream) -> Result<()> {
            Err(NO_DEVICE)
        }
        pub unsafe fn memcpy_dtoh_async<T>(
            _to: &mut [T],
            _from: sys::CUdeviceptr,
            _stream: sys::CUstream,
        ) -> Result<()> {
            Err(NO_DEVICE)
        }
        pub unsafe fn memcpy_dtod_async(
            _to: sys::CUdeviceptr,
            _from: sys::CUdeviceptr,
            _bytes: usize,
            _stream: sys::CUstream,
        ) -> Result<()> {
            Err(NO_DEVICE)
        }
        pub unsafe fn launch_kernel(
            _function: sys::CUfunction,
            _grid: (u32, u32, u32),
            _block: (u32, u32, u32),
            _shared: u32,
            _stream: sys::CUstream,
            _arguments: &mut [*mut c_void],
        ) -> Result<()> {
            Err(NO_DEVICE)
        }

        pub mod device {
            use super::{NO_DEVICE, Result, sys};

            pub fn get_count() -> Result<i32> {
                Err(NO_DEVICE)
            }
            pub fn get(_number: i32) -> Result<sys::CUdevice> {
                Err(NO_DEVICE)
            }
            pub fn get_name(_device: sys::CUdevice) -> Result<String> {
                Err(NO_DEVICE)
            }
            pub unsafe fn get_attribute(_device: sys::CUdevice, _attribute: sys::CUdevice_attribute) -> Result<i32> {
                Err(NO_DEVICE)
            }
            pub unsafe fn total_mem(_device: sys::CUdevice) -> Result<usize> {
                Err(NO_DEVICE)
            }
        }

        pub mod module {
            use super::{CString, NO_DEVICE, Result, c_void, sys};

            pub unsafe fn load_data(_image: *const c_void) -> Result<sys::CUmodule> {
                Err(NO_DEVICE)
            }
            pub unsafe fn get_function(_module: sys::CUmodule, _name: CString) -> Result<sys::CUfunction> {
                Err(NO_DEVICE)
            }
            pub unsafe fn unload(_module: sys::CUmodule) -> Result<()> {
                Err(NO_DEVICE)
            }
        }

        pub mod function {
            use super::{NO_DEVICE, Result, sys};

            pub unsafe fn set_function_attribute(
                _function: sys::CUfunction,
                _attribute: sys::CUfunction_attribute,
                _value: i32,
            ) -> Result<()> {
                Err(NO_DEVICE)
            }
        }
    }

    #[allow(non_camel_case_types, non_snake_case, reason = "the driver's own names")]
    pub mod sys {
        use std::ffi::c_void;

        use super::Result;

        pub type CUdeviceptr = u64;

        pub type CUdevice = i32;
        pub type CUmemoryPool = *mut c_void;
        pub type CUmodule = *mut c_void;
        pub type CUfunction = *mut c_void;
        pub type CUstream = *mut c_void;

        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum CUresult {
            CUDA_ERROR_NO_DEVICE,
            CUDA_ERROR_OUT_OF_MEMORY,
            CUDA_ERROR_NOT_READY,
        }

        impl CUresult {
            pub fn result(self) -> Result<()> {
                Err(super::DriverError(self))
            }
        }

        #[derive(Clone, Copy)]
        pub enum CUdevice_attribute {
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        }

        #[derive(Clone, Copy)]
        pub enum CUfunction_attribute {
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        }

        #[derive(Clone, Copy)]
        pub enum CUevent_flags {
            CU_EVENT_DEFAULT,
        }

        #[derive(Clone, Copy)]
        pub enum CUstreamCaptureMode {
            CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        }

        pub struct CUgraphInstantiate_flags(#[expect(dead_code, reason = "no driver reads it")] pub u32);

        pub unsafe fn is_culib_present() -> bool {
            false
        }
        pub unsafe fn cuDriverGetVersion(_version: &mut i32) -> CUresult {
            CUresult::CUDA_ERROR_NO_DEVICE
        }
        pub unsafe fn cuStreamQuery(_stream: CUstream) -> CUresult {
            CUresult::CUDA_ERROR_NO_DEVICE
        }
        pub unsafe fn cuMemsetD32Async(_to: CUdeviceptr, _word: u32, _words: usize, _stream: CUstream) -> CUresult {
            CUresult::CUDA_ERROR_NO_DEVICE
        }

        pub unsafe fn cuMemsetD8Async(_to: CUdeviceptr, _byte: u8, _bytes: usize, _stream: CUstream) -> CUresult {
            CUresult::CUDA_ERROR_NO_DEVICE
        }
        pub unsafe fn cuDeviceGetMemPool(_pool: &mut CUmemoryPool, _device: CUdevice) -> CUresult {
            CUresult::CUDA_ERROR_NO_DEVICE
        }
        pub unsafe fn cuMemPoolTrimTo(_pool: CUmemoryPool, _least: usize) -> CUresult {
            CUresult::CUDA_ERROR_NO_DEVICE
        }

        /// Stands for the driver library.
        pub struct Culib;

        pub unsafe fn culib() -> Culib {
            Culib
        }

        impl Culib {
            pub unsafe fn get<T>(&self, _symbol: &[u8]) -> std::result::Result<T, ()> {
                Err(())
            }
        }
    }
}
