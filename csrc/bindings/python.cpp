// The parts of python.h that no type of C++ changes.
#include "bindings/python.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

namespace wavemix::bindings {
namespace {

constexpr size_t kMostParameters = 32;

struct Owned {
  PyObject* object;
  explicit Owned(PyObject* of) : object(of) {
    if (object == nullptr) throw PythonError();
  }
  ~Owned() { Py_XDECREF(object); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* release() { return std::exchange(object, nullptr); }
};

std::string text(PyObject* unicode) {
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(unicode, &size);
  if (data == nullptr) throw PythonError();
  return {data, static_cast<size_t>(size)};
}

std::string type_of(PyObject* object) {
  const Owned name(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__name__"));
  return text(name.object);
}

[[noreturn]] void wrong_type(const char* expected, PyObject* got) {
  const Owned shown(PyObject_Repr(got));
  std::string value = text(shown.object);
  if (value.size() > 60) value = "a longer one";
  throw WrongType{expected, value + " of type " + type_of(got)};
}

// One function of a module; there as long as the process.
struct Function {
  std::string name, about;
  PyMethodDef method;
  Call call;
  AnyFunction function;
  std::vector<const char*> parameters;
  std::vector<PyObject*> names;  // the same, as Python's keywords are
  size_t required;

  // Position of a keyword; keywords are mostly interned, so that their addresses tell.
  size_t find(PyObject* keyword) const {
    size_t i = std::find(names.begin(), names.end(), keyword) - names.begin();
    for (size_t j = 0; i == names.size() && j < i; ++j)
      if (PyUnicode_Compare(names[j], keyword) == 0) i = j;
    if (i == names.size()) fail("it has no parameter " + text(keyword));
    return i;
  }

  [[noreturn]] void fail(const std::string& why) const {
    std::string all;
    for (const char* parameter : parameters) all += (all.empty() ? "" : ", ") + std::string(parameter);
    PyErr_SetString(PyExc_TypeError, (name + "(" + all + "): " + why).c_str());
    throw PythonError();
  }

  void place(PyObject* const* given, size_t count, PyObject* keywords, PyObject** to) const {
    if (count > names.size()) fail("got " + std::to_string(count) + " arguments");
    std::copy(given, given + count, to);
    std::fill(to + count, to + names.size(), nullptr);
    const size_t more = keywords == nullptr ? 0 : static_cast<size_t>(PyTuple_Size(keywords));
    for (size_t k = 0; k < more; ++k) {
      const size_t i = find(PyTuple_GetItem(keywords, static_cast<Py_ssize_t>(k)));
      if (to[i] != nullptr) fail(std::string("got ") + parameters[i] + " twice");
      to[i] = given[count + k];
    }
    for (size_t i = 0; i < required; ++i)
      if (to[i] == nullptr) fail(std::string("needs ") + parameters[i]);
  }
};

void set_error(PyObject* type, const std::exception& error) { PyErr_SetString(type, error.what()); }

PyObject* run(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
  const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
  size_t at = 0;
  try {
    PyObject* arguments[kMostParameters];
    function.place(given, static_cast<size_t>(count), keywords, arguments);
    return function.call(function.function, arguments, at);
  } catch (const PythonError&) {
  } catch (const WrongType& wrong) {
    PyErr_SetString(PyExc_TypeError, (function.name + ": " + function.parameters[at] + ": expected " + wrong.expected +
                                      ", got " + wrong.got)
                                         .c_str());
  } catch (const std::bad_alloc& error) {
    set_error(PyExc_MemoryError, error);
  } catch (const std::invalid_argument& error) {
    set_error(PyExc_ValueError, error);
  } catch (const std::length_error& error) {
    set_error(PyExc_ValueError, error);
  } catch (const std::exception& error) {
    set_error(PyExc_RuntimeError, error);
  }
  return nullptr;
}

}  // namespace

// --- Arguments ---------------------------------------------------------------------------------------------

int64_t read_integer(PyObject* object, int64_t least, int64_t most) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError) == 0) PyErr_Clear(), wrong_type("an integer", object);
    throw PythonError();
  }
  if (value < least || value > most) wrong_type("an integer of 32 bits", object);
  return value;
}

uint64_t read_unsigned(PyObject* object) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(object);
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    wrong_type("an integer of 0 to 2^64 - 1", object);
  }
  return value;
}

bool read_bool(PyObject* object) {
  if (object == Py_True) return true;
  if (object != Py_False) wrong_type("True or False", object);
  return false;
}

double read_double(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    wrong_type("a number", object);
  }
  return value;
}

std::string read_string(PyObject* object) {
  if (!PyUnicode_Check(object)) wrong_type("a string", object);
  return text(object);
}

Items::Items(PyObject* object) : from_(object), tuple_(PyTuple_Check(object)) {
  if (!tuple_ && !PyList_Check(object)) {
    made_ = from_ = PySequence_Tuple(object);
    if (made_ == nullptr) PyErr_Clear(), wrong_type("a sequence", object);
    tuple_ = true;
  }
  size_ = static_cast<size_t>(tuple_ ? PyTuple_Size(from_) : PyList_Size(from_));
}

PyObject* Items::operator[](size_t i) const {
  const auto at = static_cast<Py_ssize_t>(i);
  PyObject* const item = tuple_ ? PyTuple_GetItem(from_, at) : PyList_GetItem(from_, at);
  if (item == nullptr) throw PythonError();  // a list that became shorter
  return item;
}

void Items::expect(size_t size) const {
  if (size_ != size) throw WrongType{"a sequence of " + std::to_string(size), std::to_string(size_)};
}

// --- Results -----------------------------------------------------------------------------------------------

PyObject* made(bool value) { return PyBool_FromLong(value); }
PyObject* made(double value) { return PyFloat_FromDouble(value); }
PyObject* made(const char* value) { return PyUnicode_FromString(value); }
PyObject* made_integer(int64_t value) { return PyLong_FromLongLong(value); }

template <class T, class Make>
PyObject* tuple_of(const std::vector<T>& values, const Make& make) {
  Owned all(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i)
    PyTuple_SetItem(all.object, static_cast<Py_ssize_t>(i), Owned(make(values[i])).release());
  return all.release();
}

PyObject* made(const std::vector<const char*>& values) { return tuple_of(values, PyUnicode_FromString); }
PyObject* made(const std::vector<uint32_t>& values) { return tuple_of(values, PyLong_FromUnsignedLong); }

// --- The module --------------------------------------------------------------------------------------------

void Module::add_object(const char* name, PyObject* object) {
  const Owned value(object);
  if (PyModule_AddObjectRef(module_, name, value.object) != 0) throw PythonError();
}

void Module::add_function(const char* name, Call call, AnyFunction address, size_t count,
                          std::vector<const char*> parameters, size_t optional) {
  if (parameters.size() != count || count > kMostParameters || optional > count)
    throw std::logic_error(std::string(name) + ": names for " + std::to_string(parameters.size()) + " parameters of " +
                           std::to_string(count));
  auto made = std::make_unique<Function>();
  made->name = name;
  made->call = call;
  made->function = address;
  made->required = count - optional;
  std::string signature;
  for (size_t i = 0; i < count; ++i) {
    signature += (i == 0 ? "" : ", ") + std::string(parameters[i]) + (i < made->required ? "" : "=()");
    made->names.push_back(Owned(PyUnicode_InternFromString(parameters[i])).release());
  }
  made->about = made->name + "(" + signature + ")\n--\n\n";  // where `inspect` looks for it
  made->parameters = std::move(parameters);
  made->method = {made->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<AnyFunction>(&run)),
                  METH_FASTCALL | METH_KEYWORDS, made->about.c_str()};
  const Owned self(PyCapsule_New(made.get(), nullptr, nullptr));
  add_object(name, PyCFunction_NewEx(&made->method, self.object, nullptr));
  (void)made.release();
}

PyObject* make_module(PyModuleDef& definition, void (*fill)(Module&)) {
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  try {
    Module filled(module);
    fill(filled);
    return module;
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
  }
  Py_DECREF(module);
  return nullptr;
}

}  // namespace wavemix::bindings
